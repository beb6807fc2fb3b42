"""Runs the CUDA kernels on the host: builds them with the C++ compiler, and serves CPU tensors with them."""

import ctypes
import hashlib
import mmap
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from td3_fast import ops

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
sys.path.append(str(HERE.parent / "ops"))  # op_checks


def build(folder: Path) -> Path:
    """The library of kernels and shim; made anew where a source, the compiler or PyTorch has changed."""
    compiler = shutil.which("g++")
    if compiler is None or not ops.has_fused():
        pytest.skip("no compiler")
    host_headers = [*CUDA.glob("*.h"), *CUDA.parent.glob("*.h"), *CUDA.glob("*.cpp")]
    host_headers.append(CUDA.parent / "cpu" / "registration.h")
    device_headers = [*CUDA.glob("*.cuh"), HERE / "device.cuh"]
    sources = [*sorted(HERE.glob("*.cpp"), reverse=True), *sorted(CUDA.glob("*.cu"))]
    flags = [
        "-std=c++20",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-DAT_PER_OPERATOR_HEADERS",
    ]
    flags += [
        f"-I{HERE}",
        f"-I{CUDA}",
        f"-I{CUDA.parent}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    flags += [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout

    def key(*parts: str | Path) -> str:
        digest = hashlib.sha256(repr((flags, version, torch.__version__)).encode())
        for part in parts:
            digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        return digest.hexdigest()[:16]

    def compile_source(source: Path) -> Path:
        on_host = source.name == "registration.cpp"
        headers = sorted(host_headers if on_host else host_headers + device_headers)
        out = folder / f"{source.stem}-{key(source, *headers)}.o"
        if not out.exists():
            # PyTorch's headers are long, and there is no arithmetic in what includes them.
            make([compiler, *flags, "-O0" if on_host else "-O1", "-xc++", "-c", str(source)], out)
        return out

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    library = folder / f"libsimt-{key(*(x.name for x in objects))}.so"
    if not library.exists():
        libraries = [str(TORCH / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")]
        make([compiler, "-shared", *map(str, objects), *libraries], library)
    return library


def make(command: list[str], out: Path) -> None:
    """Runs ``command -o out`` so that ``out`` is whole or absent."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        part = Path(scratch) / out.name
        result = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        part.rename(out)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(HERE.parents[1] / "build" / "simt")))


@pytest.fixture
def simt(library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """While this is in use, the fused ops on the CPU are the CUDA kernels; torch.empty is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.simt_install(1)
    yield library
    library.simt_install(0)
    library.simt_reverse(0)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def high_precision() -> Iterator[None]:
    """torch.set_float32_matmul_precision("high"), which permits tf32, and rows rounded to the tables' type."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def guarded() -> Callable[[Tensor], Tensor]:
    """Copies a tensor to memory that ends where access ends: reading or writing beyond it faults."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def guarded(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE + 1
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        kept.append(memory)
        end = (pages - 1) * mmap.PAGESIZE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
        copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=end - size, count=tensor.numel())
        return copy.view(tensor.shape).copy_(tensor)

    return guarded
