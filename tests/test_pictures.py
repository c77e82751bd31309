"""What all pictures have in common: a title, legends that cover no data, names apart, shares in percent."""

from itertools import combinations

import matplotlib.figure
import pytest
from conftest import load_script, random_aligner, tiny_config

from lit_llama.losses import SUPERVISED_METRICS
from lit_llama.metrics import plot_metrics
from lit_llama.preference_losses import PREFERENCE_METRICS


def metrics(path, measured):
    names = [f"{split}_{name}" for split in ("train", "validation") for name in measured]
    plot_metrics([{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)], measured, "a run", path)


def comparison(path):
    rows = [{"method": "base", "trainable_parameters": 0, "validation_loss": 4.0, "compliance": 0.0}]
    for name, count in (
        ("aligner-1", 800),
        ("aligner-10", 6000),
        ("aligner-100", 58_000),
        ("llama_adapter-10", 160_000),
        ("lora-8", 460_000),
    ):
        one = {"method": name, "trainable_parameters": count, "validation_loss": 1.5, "compliance": 1.0}
        rows += [{**one, "seed": 1}, {**one, "seed": 2, "validation_loss": 1.4, "compliance": 0.9}]
    load_script("scripts/compare_methods.py").draw(rows, "captain", "tiny on captain: 24 held-out examples", path)


def gates(path):
    folders = [path.parent / name / "aligner.safetensors" for name in ("one", "two")]
    aligners = [random_aligner(tiny_config(), length) for length in (1, 2)]
    load_script("scripts/inspect_adapter.py").draw_gates(folders, aligners, path)


def dial(path):
    rows = [
        {"scale": scale, "validation_loss": 4 - scale, "divergence": scale, "captain": 1 - scale}
        for scale in (0.0, 0.5, 1.0)
    ]
    load_script("evaluate/scale.py").draw(rows, "tiny + out/captain", path)


def subjects(path):
    script = load_script("evaluate/mmlu.py")
    areas = enumerate(("STEM", "humanities", "other"), 1)
    rows = [script.Subject(area, f"subject {n}", [1.0, 0.0] * n) for n, area in areas]
    script.draw(rows, "tiny on MMLU", path)


def verdicts(path):
    table = {"writing": [1, 0, -1], "math": [1]}
    load_script("evaluate/judge.py").draw(table, "one against two", path)


def marks(path):
    means = {name: {"fraud": [7.0, 8.0, 9.5], "all": [7.0, 8.0, 9.5]} for name in ("base", "aligned")}
    load_script("evaluate/safety.py").draw(means, "marks by a judge", path)


PICTURES = {
    "supervised": lambda path: metrics(path, SUPERVISED_METRICS),
    "pairs": lambda path: metrics(path, PREFERENCE_METRICS),
    "comparison": comparison,
    "gates": gates,
    "dial": dial,
    "subjects": subjects,
    "verdicts": verdicts,
    "marks": marks,
}


@pytest.fixture
def figures(monkeypatch):
    saved = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (save(self, *args, **kw), saved.append(self))
    )
    return saved


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(figures, tmp_path, name):
    PICTURES[name](tmp_path / "picture.png")
    [figure] = figures
    figure.draw_without_rendering()
    assert figure.get_suptitle() or all(axes.get_title() for axes in figure.axes if axes.get_label() != "<colorbar>")
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for legend in legends:
        area = legend.get_window_extent()
        assert not any(area.overlaps(axes.get_window_extent().padded(-1)) for axes in figure.axes)
        assert figure.bbox.x0 <= area.x0 < area.x1 <= figure.bbox.x1 + 1
    for axes in figure.axes:
        labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(one.overlaps(other) for one, other in combinations(labels, 2))
        if "step" in axes.get_xlabel() or axes.get_xlabel() == "head":
            assert all(float(tick).is_integer() for tick in axes.get_xticks())
    shares = "accuracy", "share", "answers with"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if any(word in axis.get_label_text() for word in shares):
                assert all(label.get_text().endswith("%") for label in axis.get_ticklabels())
