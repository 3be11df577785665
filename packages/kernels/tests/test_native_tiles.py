"""Level `amx` of the native row: its tile operations in both forms, its permission, what it leaves behind, and which products it makes."""

import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import Environment, attend, explain
from longattn.kernels.native import building, cpu
from longattn.kernels.native.building import FLAGS, refusal
from longattn.kernels.native.cpu import LEVELS, PLAIN_TILES, compiler_flags, levels
from longattn.kernels.testing import Case, cases, check_backend
from longattn.patterncache import BlockSparse, Dilated, Full, Window

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))

HEADERS = files("longattn.kernels.native")
DRIVER = Path(__file__).with_name("native_tiles.cpp")
LONGNET = Dilated((32, 64, 128), (1, 2, 4), causal=True)
HAS_TILES = "amx" in levels()
TILED = [
    PLAIN_TILES,
    pytest.param(
        "amx", marks=pytest.mark.skipif(not HAS_TILES, reason="this processor has no AMX, or the kernel refuses it")
    ),
]


@pytest.fixture(params=TILED)
def level(request: pytest.FixtureRequest, native_level: Callable[[str], str]) -> str:
    """The level in each form that runs here."""
    return native_level(request.param)


@pytest.fixture
def precision() -> object:
    """Sets torch's precision of float32 products, and puts it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def compiled(made: Path, *flags: str) -> Path:
    """The driver, built by this machine's compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no c++ here")
    command = [compiler, "-std=c++17", "-O2", "-w", *flags, f"-I{HEADERS}", str(DRIVER), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    return made


def knows_tiles() -> bool:
    """Whether the compiler can build the processor's form, which a test on any x86 machine then does."""
    command = ["c++", "-mamx-tile", "-mamx-bf16", "-x", "c++", "-fsyntax-only", "-"]
    return (
        shutil.which("c++") is not None
        and not subprocess.run(command, input=b"", capture_output=True, check=False).returncode
    )


@pytest.mark.parametrize("vectors", [name for name in levels() if name not in ("amx", "avx512bf16")])
def test_plain_tiles_are_what_the_manual_says(vectors: str, tmp_path: Path):
    """In every bit, denormals, infinities and NaN included, with each width of vectors."""
    done = subprocess.run(
        [compiled(tmp_path / "driver", *LEVELS[vectors])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not HAS_TILES, reason="this processor has no AMX, or the kernel refuses it")
def test_the_processors_tiles_are_what_the_manual_says(tmp_path: Path):
    """The permission that this process asked for passes on to the driver."""
    driver = compiled(tmp_path / "driver", *(flag for flag in LEVELS["amx"] if flag.startswith("-m")))
    done = subprocess.run([driver, "processor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not knows_tiles(), reason="there is no compiler that knows -mamx-tile and -mamx-bf16")
def test_the_processors_form_compiles_anywhere(tmp_path: Path):
    """The whole library, as the level asks for it, but for optimisation; it has products of tiles in it."""
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    command = [
        "c++",
        *flags,
        "-O1",
        "-S",
        *LEVELS["amx"],
        str(HEADERS / "attend.cpp"),
        "-o",
        str(tmp_path / "library.s"),
    ]
    subprocess.run(command, check=True, timeout=300)
    assert "tdpbf16ps" in (tmp_path / "library.s").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [7, 32, 64, 96, 128, 200])
def test_any_head_dim(level: str, dtype: torch.dtype, head_dim: int):
    """One, two, three, four and more tiles to a row, each with a path of its own; forward and back."""
    check_backend("native", Case(LONGNET, (75, 140), batch=1, kv_heads=1, group=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern", [Full(), Window(40, sinks=3), Window(33, causal=False), BlockSparse(16, torch.eye(14).bool())], ids=str
)
def test_reaches_beside_the_tiles(level: str, dtype: torch.dtype, pattern):
    """Blocks of 32 rows meet parts of tiles of 128 keys, with mask, padding, dropout and prior, in one pass back and in two."""
    check_backend("native", Case(pattern, (224, 224), batch=1, kv_heads=2, dtype=dtype, mask="+bhqk", dropout_p=0.2))
    check_backend("native", Case(pattern, (97, 224), batch=1, kv_heads=1, dtype=dtype, padding=True, prior=True))


@given(data=st.data())
def test_any_call(data: st.DataObject):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGATTN_NATIVE", PLAIN_TILES)
        check_backend("native", data.draw(cases(data.draw(st.sampled_from([torch.float16, torch.bfloat16])))))


@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("head_dim", [8, 64, 100])
def test_few_rows(level: str, group: int, head_dim: int):
    """From four rows that share keys on in tiles; with hidden keys, and rows of k that end inside a tile."""
    for padding in (False, True):
        case = Case(
            Full(causal=True),
            (2, 150),
            kv_heads=1,
            group=group,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            padding=padding,
        )
        check_backend("native", case)


def error_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Of the native row, beside float64."""
    truth = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    return float((attend(q, k, v, Full(), backend="native").out - truth).abs().max())


def test_float16_is_split_exactly(level: str):
    """The errors are those of weights that are split, 2^-17, not of bfloat16's, 2^-9."""
    assert error_of(*torch.randn(3, 1, 150, 2, 64).half()) < 3e-5


def test_float32_follows_torchs_setting(level: str, precision):
    """Of a call that was prepared before the setting changed too: three products of bfloat16 where "high" or "medium" allows them."""
    q, k, v = torch.randn(3, 1, 150, 2, 64)
    environment = Environment()

    def outs() -> torch.Tensor:
        return attend(q, k, v, Full(), backend="native", environment=environment).out

    precision("highest")
    whole = outs()
    assert error_of(q, k, v) < 2e-6
    for setting in ("high", "medium"):
        precision(setting)
        assert not torch.equal(outs(), whole)
        assert 1e-7 < error_of(q, k, v) < 1e-4
    precision("highest")
    assert torch.equal(outs(), whole)


def test_gradients_of_float32_at_high(level: str, precision):
    precision("high")
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 100, 2, 40).unbind()]
    grad = torch.randn(1, 100, 2, 40)
    at_high = torch.autograd.grad(attend(*inputs, LONGNET, backend="native").out, inputs, grad)
    precision("highest")
    exact = torch.autograd.grad(attend(*inputs, LONGNET, backend="native").out, inputs, grad)
    for a, b in zip(at_high, exact, strict=True):
        assert torch.allclose(a, b, atol=2e-4) and not torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_others_compute_is_as_before(level: str, threads: int):
    """Torch's own products of bfloat16, which keep a layout of tiles of their own, and denormals, in turn with ours on the same threads."""
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(2, 128, 128).bfloat16()
        tiny = torch.full((64,), 1e-40)
        q = torch.randn(1, 200, 2, 64).bfloat16().requires_grad_()
        product, half = a @ b, tiny * 0.5
        bits = attend(q, q, q, Full(), backend="native").out
        for _ in range(3):
            assert torch.equal(a @ b, product) and torch.equal(tiny * 0.5, half)
            out = attend(q, q, q, Full(), backend="native").out
            assert torch.equal(out, bits)
            assert torch.equal(a @ b, product)
            out.sum().backward()
            assert torch.equal(a @ b, product) and torch.equal(tiny * 0.5, half)
    finally:
        torch.set_num_threads(before_threads)


@pytest.fixture
def refused_tiles(monkeypatch: pytest.MonkeyPatch) -> object:
    """A processor with tiles, and a kernel that refuses them."""
    every = frozenset(f"{cpu._FLAG_NAMES.get(f[2:], f[2:])}" for f in LEVELS["amx"] if f.startswith("-m"))
    caches = (cpu.widest, cpu.tiles_refusal, building.target)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_flags", lambda: every)
    monkeypatch.setattr(cpu, "tiles_refusal", lambda: "the kernel refuses this process AMX")
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("refused_tiles")
def test_where_the_kernel_refuses_the_next_level_serves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LONGATTN_NATIVE", raising=False)
    assert levels()[0] == "avx512bf16"
    text = str(explain(Full(), (1, 100, 2, 64), dtype=torch.bfloat16))
    assert "level avx512bf16, for the kernel refuses this process AMX" in text
    monkeypatch.setenv("LONGATTN_NATIVE", "amx")
    assert refusal() == "LONGATTN_NATIVE=amx: the kernel refuses this process AMX"


def test_the_kernel_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    """Where it has no such call, or no such processor, its answer is a reason."""
    cpu.tiles_refusal.cache_clear()
    try:
        answer = cpu.tiles_refusal()
        assert (answer is None) == HAS_TILES or "AMX" in str(answer)
        assert cpu.tiles_refusal() is answer
    finally:
        cpu.tiles_refusal.cache_clear()


def test_flags_of_plain_tiles():
    assert "-DLONGATTN_TILES=PlainTiles" in compiler_flags(PLAIN_TILES)
    assert "-mamx-tile" not in compiler_flags(PLAIN_TILES)
