"""`examples.quality` beside the recall tasks: loss by position, fidelity of gradients, a pretrained encoder; each in small."""

import csv
from pathlib import Path

import pytest
import torch

from examples.quality import adapt, fidelity, text
from longattn.patterncache import Dilated, Full, Window

PATTERN = Dilated((16, 32, 64), (1, 2, 4), causal=True)


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight texts of two letters and a short one."""
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(bytes([97 + number, 98 + number]) * 100)
    (tmp_path / "texts" / "short.txt").write_bytes(b"short")
    return tmp_path / "texts"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_held_out_texts_are_read_by_nobody(folder: Path):
    """Seven documents are trained on, the eighth is judged, and the short one is neither."""
    read, held = text.documents(folder, 64)
    assert [len(read), len(held)] == [7, 1] and set(held[0].tolist()) == {104, 105}
    with pytest.raises(SystemExit, match="--data must hold 8 files of more than --length=200 bytes, got 0"):
        text.documents(folder, 200)


def test_loss_by_position(folder: Path, tmp_path: Path):
    """Sixteen stretches for each family, which cover the length; what the file holds is not trained again."""
    options = ["--data", str(folder), "--length", "64", "--steps", "2", "--judged", "4", "--seeds", "0"]
    options += ["--out", str(tmp_path / "text.csv"), "--families", "dense", "islands"]
    text.main(options)
    text.main(options)
    written = rows(tmp_path / "text.csv")
    assert [(row["family"], int(row["begin"]), int(row["end"])) for row in written] == [
        (family, begin, begin + 4) for family in ("dense", "islands") for begin in range(0, 64, 4)
    ]
    assert all(4 < float(row["loss"]) < 8 for row in written)


def test_a_model_reads_what_its_seed_says(folder: Path):
    """The same losses again, others for another seed; and a text of two letters is learnt."""
    read, _ = text.documents(folder, 32)
    once, again, other = (
        text.train([Window(8)] * 2, read, seed, 32, 2, 20, 1e-2, progress=lambda line: None)[1] for seed in (0, 0, 1)
    )
    assert once == again != other and once[-1] < once[0] / 2


def test_gradients_of_each_way():
    """Exact is float64's; detached is not, but for values; rounding the states costs more than keeping them in float32."""
    found = {
        (way, row["gradient"]): float(str(row["error"]))
        for way in fidelity.WAYS
        for row in fidelity.errors(PATTERN, way, 64, 0, 2.0)
    }
    assert all(found["exact", name] < 1e-5 for name in "qkv")
    assert found["detached", "v"] < 1e-5 and min(found["detached", "q"], found["detached", "k"]) > 0.02
    assert all(1e-4 < found["bfloat16", name] < found["bfloat16 merges", name] < 0.05 for name in "qkv")


def test_fidelity_writes_both_files(folder: Path, tmp_path: Path):
    """A row for each gradient, and for each stretch of a curve."""
    options = ["--data", str(folder), "--length", "64", "--batch", "2", "--steps", "2", "--seeds", "0"]
    fidelity.main([*options, "--out", str(tmp_path / "fidelity.csv")])
    assert len(rows(tmp_path / "fidelity.csv")) == 2 * len(fidelity.WAYS) * 3
    assert {row["way"] for row in rows(tmp_path / "fidelity-curves.csv")} == set(fidelity.WAYS)


def test_an_encoder_is_judged_and_pulled_back():
    """An untrained one: dense is itself, a window is not, and some steps bring it nearer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, initializer_range=0.2, **size)
    model = transformers.BertModel(config).eval()
    tokens, owners = torch.randint(50, (8, 32)), torch.arange(8) // 2
    with torch.no_grad():
        dense = adapt.embeddings(model, tokens)
    adapt.use_pattern(model, Full())
    assert adapt.judge(model, tokens, owners, dense)["cosine"] == pytest.approx(1.0, abs=1e-3)
    adapt.use_pattern(model, Window(1, causal=False))
    before = adapt.judge(model, tokens, owners, dense)["cosine"]
    adapt.tune(model, tokens, dense, steps=20, batch=4, rate=1e-3, seed=0)
    assert before < adapt.judge(model, tokens, owners, dense)["cosine"] < 1


def test_weights_must_be_there(monkeypatch: pytest.MonkeyPatch):
    """Nothing is fetched."""
    monkeypatch.setattr(adapt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--model must be a folder"):
        adapt.weights()
