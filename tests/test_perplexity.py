"""Perplexity by hand, and by transformers' loss."""

import json
import math
import re

import pytest
import torch
import transformers

from lit_llama.base import open_base
from lit_llama.data import TokenDataset, collate
from lit_llama.losses import supervised_loss

TEXT = "the cat sat on a mat and 12 dogs ran to 3 houses of the old king. " * 6


def numbers(out):
    return [[float(cell) for cell in re.findall(r"[-+]?\d+\.\d+", line)] for line in out.splitlines()[2:]]


def test_of_a_text(command, base_dir, hf_checkpoint, tmp_path):
    """In one window it is transformers' loss; in several, the sum over windows that overlap by half."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    ids = torch.tensor([open_base(base_dir).tokenizer.encode(TEXT, bos=True)])
    theirs = transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint)
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
        logprobs = torch.cat(
            [
                theirs(ids[:, begin : begin + 64])
                .logits.log_softmax(-1)[0, :-1]
                .gather(1, ids[0, begin + 1 : begin + 64, None])[(0 if begin == 0 else 31) :, 0]
                for begin in range(0, ids.size(1) - 32, 32)
            ]
        )
    assert len(logprobs) == ids.size(1) - 1
    for window, nats in ((256, loss), (64, -logprobs.mean().item())):
        assert ids.size(1) < 256
        options = {"checkpoint_dir": base_dir, "text_path": file, "window": window, "out_dir": tmp_path}
        status, out, err = command("evaluate/perplexity.py", **options)
        assert status == 0, err
        [[found, perplexity, *interval, bits]] = numbers(out)
        assert found == pytest.approx(nats, abs=1e-4)
        assert perplexity == pytest.approx(math.exp(nats), abs=0.01)
        if window == 256:  # one piece says nothing of the spread
            assert not interval
            assert "There is no interval, as all of it is one piece" in err
            assert "A smaller --window makes more." in err
        else:
            assert interval[0] <= perplexity <= interval[1]
        assert bits == pytest.approx(nats * (ids.size(1) - 1) / math.log(2) / len(TEXT), abs=1e-3)


def test_of_a_data_set(command, base_dir, data_dir, aligner_path, tmp_path):
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "adapter_path": aligner_path, "out_dir": tmp_path}
    status, out, err = command("evaluate/perplexity.py", **options)
    assert status == 0, err
    base = open_base(base_dir)
    dataset = TokenDataset(data_dir, "validation", base.tokenizer, 4096)
    with torch.no_grad():
        sums = supervised_loss(base.model, None, collate([row for i in range(len(dataset)) for row in dataset[i]]))
    base, tuned, _, (added, low, high) = numbers(out)
    assert added == pytest.approx(tuned[0] - base[0], abs=1.1e-4)
    assert base[0] == pytest.approx((sums.metrics["loss"] / sums.count).item(), abs=1e-4)
    assert tuned[0] < base[0]  # it was trained on the like
    assert low - 1e-4 <= tuned[0] - base[0] <= high + 1e-4 < 1e-4


def test_goes_on_where_it_stopped(command, base_dir, data_dir, aligner_path, tmp_path):
    """What is kept is used, whatever it says, but not for other weights."""
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    whole = command("evaluate/perplexity.py", **options)[1]
    kept = tmp_path / "pieces.jsonl"
    rows = kept.read_text().splitlines()
    kept.write_text("\n".join(rows[1:])[:-5])  # without the first, the last cut short
    assert command("evaluate/perplexity.py", **options)[1] == whole
    kept.write_text("".join(json.dumps({**json.loads(row), "logprob": 0.0}) + "\n" for row in rows))
    status, out, err = command("evaluate/perplexity.py", **options, adapter_path=aligner_path)
    assert status == 0, err
    base, tuned, *_ = numbers(out)
    assert base[0] == 0 < tuned[0]


def test_bad_input(command, base_dir, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "give --text_path or --data_dir" in command("evaluate/perplexity.py", checkpoint_dir=base_dir)[2]
    assert "holds no text" in command("evaluate/perplexity.py", checkpoint_dir=base_dir, text_path=empty)[2]
    options = {"checkpoint_dir": base_dir, "text_path": empty, "window": 1}
    assert "--window is 1" in command("evaluate/perplexity.py", **options)[2]
