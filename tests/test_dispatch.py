"""Dispatch: the order, the refusals, strictness, and what is said about them."""

import threading

import pytest
import torch

from lowbit import dispatch
from lowbit.errors import UnsupportedError
from lowbit.formats import formats, parse_spec
from lowbit.ops import generic

SPEC = "fp8_e4m3(granularity=row)"


@pytest.fixture
def kernels(monkeypatch):
    """A private copy of the kernel table, with the kernels of eager alone."""
    dispatch.load("eager")
    rows = dispatch._STATE.kernels.items()
    eager = {place: [entry for entry in row if entry.backend == "eager"] for place, row in rows}
    state = dispatch._State(eager, {**dispatch._STATE.loaded, "cpu": "left out by this test"})
    monkeypatch.setattr(dispatch, "_STATE", state)
    return state


def _call():
    fmt = parse_spec(SPEC)
    w = torch.randn(8, 32)
    return (fmt, torch.randn(2, 32), fmt.quantize(w), None)


def test_eager_serves_what_no_other_backend_does(kernels):
    """Without any other kernel, eager is selected and runs."""
    args = _call()

    entry = dispatch.select("linear", "fp8_e4m3", "", "cpu", args)

    assert entry.name == "eager:linear"
    assert entry.run(*args).shape == (2, 8)


def test_a_preferred_backend_runs_unless_it_refuses(kernels):
    """The cpu kernel wins over eager while its `refuses` says nothing, and loses when it says something."""
    why: list[str | None] = [None]
    kernels.loaded["cpu"] = None

    @dispatch.kernel("linear", backend="cpu", format="fp8_e4m3", refuses=lambda *_: why[0])
    def linear_fp8(fmt, x, parts, bias):
        return "cpu ran"

    args = _call()
    assert dispatch.select("linear", "fp8_e4m3", "", "cpu", args).name == "cpu:linear_fp8"

    why[0] = "K must be a multiple of 64"
    assert dispatch.select("linear", "fp8_e4m3", "", "cpu", args).name == "eager:linear"
    assert dispatch.explain("linear", "fp8_e4m3", "", "cpu", args)["cpu:linear_fp8"] == why[0]


def test_what_was_selected_is_forgotten_when_it_may_change(kernels):
    """A kernel that is registered after a call takes the next one, and use_backend decides while it is in force."""
    kernels.loaded["cpu"] = None
    args = _call()

    def chosen():
        return dispatch.select("linear", "fp8_e4m3", "", "cpu", args).name

    assert chosen() == "eager:linear"

    @dispatch.kernel("linear", backend="cpu", format="fp8_e4m3")
    def linear_fp8(fmt, x, parts, bias):
        return "cpu ran"

    assert chosen() == "cpu:linear_fp8"
    with dispatch.use_backend("eager"):
        assert chosen() == "eager:linear"
        with dispatch.use_backend("cpu"):
            assert chosen() == "cpu:linear_fp8"
    assert chosen() == "cpu:linear_fp8"


def test_use_backend_is_strict(kernels):
    """A forced backend that refuses raises with its reason rather than let another one run."""
    kernels.loaded["cpu"] = None

    @dispatch.kernel("linear", backend="cpu", format="fp8_e4m3", refuses=lambda *_: "not on Sundays")
    def linear_fp8(fmt, x, parts, bias):
        return None

    with dispatch.use_backend("cpu"), pytest.raises(UnsupportedError, match="not on Sundays") as caught:
        dispatch.select("linear", "fp8_e4m3", "", "cpu", _call())

    assert caught.value.refusals["eager"] == "use_backend('cpu') is in force"
    assert dispatch.select("linear", "fp8_e4m3", "", "cpu", _call()).backend == "eager"


def test_an_exception_inside_a_kernel_propagates(kernels):
    """A kernel that fails is not silently replaced by another backend."""
    kernels.loaded["cpu"] = None

    @dispatch.kernel("linear", backend="cpu", format="fp8_e4m3")
    def linear_fp8(fmt, x, parts, bias):
        raise ZeroDivisionError

    _, x, parts, bias = _call()
    with pytest.raises(ZeroDivisionError):
        generic.run_linear(x, list(parts.values()), bias, SPEC)


def test_an_unknown_backend_is_refused_by_name():
    """A typing error in a backend's name is an error, not a no-op."""
    with pytest.raises(UnsupportedError, match="unknown backend 'cudaa'; the backends are cuda, triton, cpu, eager"):
        dispatch.use_backend("cudaa").__enter__()


def test_a_backend_that_is_not_built_says_so(kernels, monkeypatch):
    """use_backend names the reason of a backend that cannot be imported."""
    kernels.loaded["cuda"] = "not part of this build"

    with pytest.raises(UnsupportedError, match="the cuda backend cannot be used: not part of this build"):
        dispatch.use_backend("cuda").__enter__()


def test_a_broken_backend_is_recorded_not_raised(kernels, monkeypatch):
    """An ImportError inside a backend package becomes its recorded reason."""

    def broken(name):
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    kernels.loaded.pop("cuda", None)

    assert dispatch.load("cuda") == "ImportError: libfoo.so.1: cannot open shared object file"


def test_two_kernels_for_one_place_are_refused(kernels):
    """A second eager linear for all formats cannot silently take the first one's place."""
    with pytest.raises(UnsupportedError, match="registered already"):

        @dispatch.kernel("linear", backend="eager")
        def linear_again(fmt, x, parts, bias):
            return None


def test_a_layout_is_only_given_to_a_kernel_that_reads_it(kernels):
    """A kernel for plain parts is passed over for packed ones; eager unpacks them, and the reasons say so."""
    kernels.loaded["cpu"] = None

    @dispatch.kernel("linear", backend="cpu", format="fp8_e4m3")
    def linear_fp8(fmt, x, parts, bias):
        return None

    args = _call()
    entry = dispatch.select("linear", "fp8_e4m3", "swizzled", "cpu", args)
    reasons = dispatch.explain("linear", "fp8_e4m3", "swizzled", "cpu", args)

    assert (entry.backend, entry.layout) == ("eager", dispatch.ANY_LAYOUT)
    assert reasons["cpu:linear_fp8"].startswith("reads layout 'plain', not 'swizzled'; repack at load")
    assert reasons["eager:linear"] == "runs, but unpacks the layout at every call"
    assert dispatch.explain("linear", "fp8_e4m3", "", "cpu", args)["eager:linear"] == "runs"
    with dispatch.use_backend("cpu"), pytest.raises(UnsupportedError, match="not 'swizzled'; repack at load"):
        dispatch.select("linear", "fp8_e4m3", "swizzled", "cpu", args)


def test_no_weight_is_put_into_a_layout_that_files_hold(kernels):
    """A kernel for tiles as files hold them makes no plain weight into tiles; one whose layout is made at load does."""
    kernels.loaded["cpu"] = None
    fmt = parse_spec("svdquant_w4a4")

    @dispatch.kernel("linear", backend="cpu", format="svdquant_w4a4", layout="kitchen_tile_packed_w4a4")
    def linear_tiles(fmt, x, parts, bias):
        return None

    @dispatch.kernel("linear", backend="cpu", format="svdquant_w4a4")
    def linear_plain(fmt, x, parts, bias):
        return None

    assert dispatch.preferred_layout("linear", fmt, 256, 128, "cpu") == ""

    @dispatch.kernel("linear", backend="cpu", format="svdquant_w4a4", layout="rows16")
    def linear_rows16(fmt, x, parts, bias):
        return None

    assert dispatch.preferred_layout("linear", fmt, 256, 128, "cpu") == "rows16"


def test_no_weight_is_packed_for_a_kernel_that_this_machine_cannot_run(kernels):
    """A kernel that says so takes no weight into its layout, and keeps it out of none that the next one reads."""
    kernels.loaded["cpu"] = None
    fmt, runs = parse_spec("svdquant_w4a4"), False

    @dispatch.kernel("linear", backend="cpu", format="svdquant_w4a4", layout="rows16", packs=lambda: runs)
    def linear_rows16(fmt, x, parts, bias):
        return None

    assert dispatch.preferred_layout("linear", fmt, 256, 128, "cpu") == ""
    runs = True
    assert dispatch.preferred_layout("linear", fmt, 256, 128, "cpu") == "rows16"


def test_use_backend_follows_the_context_not_the_process():
    """Another thread is not affected by a use_backend block."""
    seen = []

    with dispatch.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(dispatch._forced.get()))
        thread.start()
        thread.join()

    assert seen == [None]


def test_every_kernel_of_the_table_belongs_to_a_known_format():
    """No kernel is registered for a format that does not exist."""
    dispatch.load("eager")
    known = {*formats(), dispatch.ANY_FORMAT}

    assert {entry.format for entry in dispatch.table()} <= known
