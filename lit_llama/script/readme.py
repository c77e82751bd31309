"""README files of exports: what the folder holds, and how to get an answer from it."""

from collections.abc import Sequence
from pathlib import Path

import lit_llama
from lit_llama.adapters import AdapterInfo
from lit_llama.files import read_json
from lit_llama.formats.peft import CONFIG_FILE
from lit_llama.prompts import CHAT_STYLES, chat_switch, prompt_style
from lit_llama.tokenizer import Tokenizer

MODEL_README = """# {title}

{base}{adapters}, exported to Hugging Face's format by Lit-LLaMA-Aligner {version}.
Run this in the folder above this one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}"{options})
tokenizer = AutoTokenizer.from_pretrained("{title}"{options})
{answer}
```

{how}
"""
PEFT_README = """---
base_model: {base}
library_name: peft
---

# {title}

An adapter for {base} ({adapters}), exported to PEFT's format by Lit-LLaMA-Aligner {version}.
Run this in the folder above this one:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{title}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
{answer}
```

{how}
"""
ANSWER = """
{ids}
answer = model.generate(ids, max_new_tokens=256, do_sample=False)[0, ids.size(1) :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def write_readme(folder: Path, name: str, base: str, infos: Sequence[AdapterInfo], tokenizer: Tokenizer) -> None:
    """Say what the folder holds and how to get an answer from it."""
    styles = [info.prompt_style for info in infos if info.prompt_style]
    untrained = "chat" if tokenizer.chat_template else "none"
    style = prompt_style(styles[0] if styles else "alpaca" if infos else untrained, tokenizer)
    ids = f'prompt = {style.prompt("Name three rivers.")!r}\nids = tokenizer(prompt, return_tensors="pt")["input_ids"]'
    if style.name in CHAT_STYLES:
        switch = "".join(f", {name}={thinking}" for name, thinking in chat_switch(style.name, tokenizer).items())
        ids = (
            'messages = [{"role": "user", "content": "Name three rivers."}]\n'
            f"text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{switch})\n"
            'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]'
        )
    for_peft = (folder / CONFIG_FILE).is_file()
    config = {} if for_peft else read_json(folder / "config.json")
    code = "auto_map" in config
    how = "The weights are those of the base model."
    if code:
        how = f"`{config['auto_map']['AutoConfig'].partition('.')[0]}.py` holds the attention that the prefixes need."
    elif infos and not for_peft:
        stock = config["architectures"][0]
        how = f"Stock `{stock}`; what the adapters add is in the weights and biases of its projections."
    if for_peft:
        how = "The base model is not in this folder: it is read from where its name says."
    if styles:
        how += f" Trained with prompts in the style {', '.join(sorted(set(styles)))}."
    adapters = [
        " ".join([info.method, *(str(info.config[size]) for size in ("length", "r") if size in info.config)])
        for info in infos
    ]
    text = (PEFT_README if for_peft else MODEL_README).format(
        title=name,
        base=base,
        adapters=" + ".join(adapters) if for_peft else "".join(f" + {adapter}" for adapter in adapters),
        version=lit_llama.__version__,
        options=", trust_remote_code=True" if code else "",
        answer=ANSWER.format(ids=ids),
        how=how,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
