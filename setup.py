"""Builds ``kdkernels/_C``, the CPU kernels, and ``kdkernels/_C_cuda``. All else stands in pyproject.toml.

``KDKERNELS_BUILD`` says what to build:
    auto    what this machine can build; the last line of the build says what was left out and why (default)
    cpu     the CPU kernels, or fail
    cuda    the CPU and the CUDA kernels, or fail
    none    nothing: Triton and plain PyTorch still work
``CXX`` names the compiler, ``MAX_JOBS`` the number of files compiled at once. nvcc is looked for in ``CUDA_HOME``, or
else on the path; ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a+PTX") names the GPUs to compile for, by default one of each
generation, as far as nvcc knows them.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
# The oldest release whose stable ABI has all that csrc uses; the library then loads in every later one.
TORCH_FLOOR = (2, 10)
CXX_STANDARD = "-std=c++17"
# Contraction to fused multiply-adds is what the kernels count on; ISO mode turns it off in GCC.
CXX_FLAGS = ["-ffp-contract=fast", "-g0", "-fvisibility=hidden", "-Werror=return-type"]
# Files compiled for one instruction set, by the end of their name; the dispatcher picks one at run time.
X86_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    # GCC's headers of these intrinsics use values before they are set, on purpose.
    "_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}
X86_MACROS = [("KDK_HAVE_AVX2", "1"), ("KDK_HAVE_AVX512", "1")]

# Ampere; Hopper, from which on there are clusters; Blackwell of data centres and of consumers, and PTX for what comes.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0+PTX")


class CannotBuild(Exception):
    """Why this machine cannot build an extension, in words for its user."""


def find_torch() -> Path:
    """The folder of the installed torch, read and not imported: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(
            "torch is not installed in the build environment (install torch first, then use pip's --no-build-isolation)"
        )
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if found and (int(found[2]), int(found[3])) < TORCH_FLOOR:
        raise CannotBuild(f"torch {found[1]} is older than {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}")
    return folder


def find_compiler() -> tuple[str, bool]:
    """A C++ compiler command line, and whether it compiles for x86-64."""
    if os.name != "posix":
        raise CannotBuild("only the command lines of GCC and Clang are known to this build")
    # The compiler Python itself was built with need not be on this machine.
    named = [os.environ["CXX"]] if os.environ.get("CXX") else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    candidates = [name for name in named if name and shutil.which(shlex.split(name)[0])]
    if not candidates:
        raise CannotBuild(f"no C++ compiler found (looked for {', '.join(str(name) for name in named)})")
    command = shlex.split(candidates[0]) + [CXX_STANDARD, "-x", "c++", "-E", "-dM", "-"]
    probe = subprocess.run(command, input="#include <cmath>\n", capture_output=True, text=True)
    if probe.returncode != 0:
        complaint = "".join(f": {line}" for line in probe.stderr.strip().splitlines()[-1:])
        raise CannotBuild(f"{candidates[0]} does not compile C++17{complaint}")
    return candidates[0], "#define __x86_64__ " in probe.stdout


def cpu_extension() -> Extension:
    """``kdkernels/_C``: the schemas and the CPU kernels, against LibTorch's stable ABI and no Python API at all."""
    torch = find_torch()
    compiler, is_x86_64 = find_compiler()
    os.environ["CXX"] = compiler
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    # torch has no build for Macs with an x86 processor, and a universal compiler would refuse these flags.
    use_x86 = is_x86_64 and sys.platform != "darwin"
    if not use_x86:
        sources = [source for source in sources if not isa_flags(source)]
    return Extension(
        "kdkernels._C",
        sources,
        depends=[path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")],
        include_dirs=["csrc/include", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", target_version()),
            *(X86_MACROS if use_x86 else []),
        ],
        extra_compile_args=[CXX_STANDARD, "-O3", *CXX_FLAGS],
        py_limited_api=True,
        language="c++",
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise CannotBuild(f"no nvcc found in {os.path.join(home, 'bin') if home else 'PATH, and CUDA_HOME is not set'}")
    return nvcc


def cuda_version(torch: Path) -> str:
    """The CUDA release that this torch was built for."""
    found = re.search(r"^cuda(?:: [^=]*)? = '([\d.]+)'", (torch / "version.py").read_text(), flags=re.M)
    if found is None:
        raise CannotBuild("this torch is not a CUDA build")
    return found[1]


def architecture_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """nvcc's flags for the GPUs to compile for, and their names."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    asked = [name for name in named if name]
    flags, names = [], []
    for name in asked or CUDA_ARCHITECTURES:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a;12.0+PTX', got {name!r}")
        number, suffix, ptx = found[1] + found[2], found[3], found[4]
        if f"sm_{number}" not in known:
            if asked:
                raise CannotBuild(f"TORCH_CUDA_ARCH_LIST asks for {name}, which {nvcc} does not know")
            continue
        code = number + suffix
        flags += ["-gencode", f"arch=compute_{code},code=sm_{code}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{code},code=compute_{code}"]
        names.append(f"sm_{code}{'+PTX' if ptx else ''}")
    if not flags:
        raise CannotBuild(f"{nvcc} knows none of the GPUs {', '.join(CUDA_ARCHITECTURES)}")
    return flags, names


class CudaExtension(Extension):
    """With the compiler it needs, and what to say of it."""

    nvcc = ""
    outcome = ""


def cuda_extension() -> CudaExtension:
    """``kdkernels/_C_cuda``: the CUDA kernels, by nvcc itself (torch's CUDAExtension wants a GPU's torch imported)."""
    torch = find_torch()
    release = cuda_version(torch)
    nvcc = find_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or found[1] != release.partition(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "unknown"
        raise CannotBuild(f"nvcc is of CUDA {version}, this torch of CUDA {release}")
    flags, names = architecture_flags(nvcc)
    extension = CudaExtension(
        "kdkernels._C_cuda",
        sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu")),
        depends=[path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()],
        include_dirs=["csrc/include", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "torch_cuda"],
        # USE_CUDA declares the function that gives torch's current stream.
        define_macros=[("TORCH_TARGET_VERSION", target_version()), ("USE_CUDA", "1")],
        extra_compile_args=[CXX_STANDARD, "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *flags],
        # The static runtime: no other release of it is looked for when the library is loaded.
        extra_link_args=["-cudart", "static"],
        py_limited_api=True,
        language="c++",
    )
    extension.nvcc = nvcc
    extension.outcome = f"the CUDA extension for {', '.join(names)}, with {nvcc}"
    return extension


def target_version() -> str:
    return f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def isa_flags(source: str) -> list[str]:
    return next((flags for suffix, flags in X86_FLAGS.items() if Path(source).stem.endswith(suffix)), [])


def isa_rank(source: str) -> int:
    return next((rank for rank, suffix in enumerate(X86_FLAGS, 1) if Path(source).stem.endswith(suffix)), 0)


class BuildExt(build_ext):
    """setuptools' build_ext with flags of a file's own, and files compiled side by side."""

    def build_extension(self, ext):
        output = self.get_ext_fullpath(ext.name)
        if not self.force and os.path.exists(output):
            built = os.path.getmtime(output)
            if all(os.path.getmtime(path) < built for path in [*ext.sources, *ext.depends, __file__]):
                return
        # Of an inline function that several files emit the linker keeps the first copy: it must be the one that every
        # processor can run.
        sources = sorted(ext.sources, key=lambda source: (isa_rank(source), source))
        nvcc = getattr(ext, "nvcc", None)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            # The slow ones, which are last in that order, begin first.
            compile_one = self.compile_one if nvcc is None else self.compile_with_nvcc
            compiled = {source: pool.submit(compile_one, ext, source) for source in reversed(sources)}
        objects = [compiled[source].result() for source in sources]
        if nvcc is not None:
            folders = [f"-L{folder}" for folder in ext.library_dirs]
            libraries = [f"-l{library}" for library in ext.libraries]
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, "-shared", "-o", output, *objects, *folders, *libraries, *ext.extra_link_args])
            return
        self.compiler.link_shared_object(
            objects,
            output,
            libraries=self.get_libraries(ext),
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_one(self, ext, source):
        (result,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args + isa_flags(source),
        )
        return result

    def compile_with_nvcc(self, ext, source):
        result = os.path.join(self.build_temp, f"{source}.o")
        Path(result).parent.mkdir(parents=True, exist_ok=True)
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        folders = [f"-I{folder}" for folder in ext.include_dirs]
        self.spawn([ext.nvcc, *ext.extra_compile_args, *macros, *folders, "-c", source, "-o", result])
        return result


def main() -> None:
    choice = os.environ.get("KDKERNELS_BUILD") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"KDKERNELS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    extensions = []
    outcome = "no extension, as KDKERNELS_BUILD=none asks"
    if choice != "none":
        try:
            extensions.append(cpu_extension())
            outcome = f"the CPU extension, with {os.environ['CXX']}"
        except CannotBuild as reason:
            if choice != "auto":
                raise SystemExit(f"KDKERNELS_BUILD={choice}: {reason}") from None
            outcome = f"no extension: {reason}; Triton and plain PyTorch still work"
    if extensions and choice == "cpu":
        outcome += "; no CUDA extension, as KDKERNELS_BUILD=cpu asks"
    elif extensions:
        try:
            cuda = cuda_extension()
            extensions.append(cuda)
            outcome += f"; {cuda.outcome}"
        except CannotBuild as reason:
            if choice == "cuda":
                raise SystemExit(f"KDKERNELS_BUILD={choice}: {reason}") from None
            outcome += f"; no CUDA extension: {reason}"
    distribution = setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
    if any(distribution.have_run.get(command) for command in ("build", "build_ext", "editable_wheel")):
        print(f"kdkernels: built {outcome}", flush=True)


if __name__ == "__main__":
    main()
