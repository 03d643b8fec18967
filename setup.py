"""Builds ``kdkernels/_C``, the CPU kernels, and ``kdkernels/_C_cuda``. All else stands in pyproject.toml.

``KDKERNELS_BUILD`` says what to build:
    auto    what this machine can build (default)
    cpu     the CPU kernels, or fail
    cuda    the CPU and the CUDA kernels, or fail
    none    nothing: Triton and plain PyTorch still work
``CXX`` names the compiler, ``MAX_JOBS`` the number of files compiled at once. nvcc is looked for in ``CUDA_HOME``, or
else on the path; ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a+PTX") names the GPUs to compile for, by default one of each
generation, as far as nvcc knows them.

The record of a build goes into the package, as ``_build_info.json``; ``python -m kdkernels env`` prints it.
The version of a package without CPU kernels ends in ``+no.cpu.kernels``, for pip shows nothing else of a build that
succeeds.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Optional

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, ExecError, LinkError

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
# The oldest release whose stable ABI has all that csrc uses; the library then loads in every later one.
TORCH_FLOOR = (2, 10)
CXX_STANDARD = "-std=c++17"
# Contraction to fused multiply-adds is what the kernels count on; ISO mode turns it off in GCC.
CXX_FLAGS = ["-ffp-contract=fast", "-g0", "-fvisibility=hidden", "-Werror=return-type"]
# The variables that setuptools adds to them.
FLAGS_FROM_OUTSIDE = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
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

INSTALL_COMPILER = "install a C++17 compiler (on Debian and Ubuntu `apt-get install g++`) or name one in CXX, then"

# Ampere; Hopper, from which on there are clusters; Blackwell of data centres and of consumers, and PTX for what comes.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0+PTX")

# Memory of the compiler for the largest file.
BYTES_PER_JOB = 3 * 2**29


def load_build_info() -> Any:
    """``kdkernels/build_info.py`` alone: the package itself imports torch."""
    spec = importlib.util.spec_from_file_location("kdkernels_build_info", ROOT / "kdkernels" / "build_info.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_info = load_build_info()


class CannotBuild(Exception):
    """Why this machine cannot build an extension, and what to do about it, in words for its user."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.cure = cure


class NoTorch(CannotBuild):
    """There is no torch to compile against, which is a fault of the command and not of the machine."""


def find_torch() -> Path:
    """The folder of the installed torch, read and not imported: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else hidden_torch()
    if folder is None:
        raise NoTorch("there is no torch to compile against")
    version = torch_version(folder)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < TORCH_FLOOR:
        raise NoTorch(f"torch {version} is older than {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}")
    return folder


def hidden_torch() -> Optional[Path]:
    """The torch beside this Python that pip hides from an isolated build.

    The library that it gives is the same as with --no-build-isolation, and no second torch is downloaded.
    """
    code = "import importlib.util as u; found = u.find_spec('torch'); print(found and found.origin or '')"
    visible = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=visible, cwd=os.sep)
    return Path(done.stdout.strip()).parent if done.stdout.strip() else None


def torch_version(folder: Path) -> str:
    found = re.search(r"__version__ = '([^']*)'", (folder / "version.py").read_text())
    return found[1] if found else "unknown"


def find_compiler() -> tuple[str, bool]:
    """A C++ compiler command line, and whether it compiles for x86-64."""
    if os.name != "posix":
        raise CannotBuild("only the command lines of GCC and Clang are known to this build", "use Linux or macOS, then")
    # The compiler Python itself was built with need not be on this machine.
    named = [os.environ["CXX"]] if os.environ.get("CXX") else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    candidates = [name for name in named if name and shutil.which(shlex.split(name)[0])]
    if not candidates:
        looked = ", ".join(dict.fromkeys(shlex.split(name)[0] for name in named if name))
        raise CannotBuild(f"no C++ compiler found (looked for {looked})", INSTALL_COMPILER)
    complaints = []
    for candidate in dict.fromkeys(candidates):
        command = shlex.split(candidate) + [CXX_STANDARD, "-x", "c++", "-E", "-dM", "-"]
        probe = subprocess.run(command, input="#include <cmath>\n", capture_output=True, text=True)
        if probe.returncode == 0:
            return candidate, "#define __x86_64__ " in probe.stdout
        complaint = "".join(f": {line}" for line in probe.stderr.strip().splitlines()[-1:])
        complaints.append(f"{candidate} does not compile C++17{complaint}")
    raise CannotBuild("; ".join(complaints), INSTALL_COMPILER)


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or command[0]


class NativeExtension(Extension):
    """With what the package is told of it, and the compiler where it is not the one of setuptools."""

    nvcc: Optional[str] = None
    record: dict[str, Any]


def cpu_extension() -> NativeExtension:
    """``kdkernels/_C``: the schemas and the CPU kernels, against LibTorch's stable ABI and no Python API at all."""
    # First: without a compiler no torch is asked for.
    compiler, is_x86_64 = find_compiler()
    torch = find_torch()
    os.environ["CXX"] = compiler
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    # torch has no build for Macs with an x86 processor, and a universal compiler would refuse these flags.
    use_x86 = is_x86_64 and sys.platform != "darwin"
    if not use_x86:
        sources = [source for source in sources if not isa_flags(source)]
    extension = NativeExtension(
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
    extension.record = {
        "built": True,
        "targets": ["baseline", *(suffix[1:] for suffix in X86_FLAGS if use_x86)],
        "compiler": first_line(*shlex.split(compiler), "--version"),
        "command": compiler,
        "flags": extension.extra_compile_args,
        "environment": {name: os.environ[name] for name in FLAGS_FROM_OUTSIDE if os.environ.get(name)},
        "torch": torch_version(torch),
    }
    return extension


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        where = os.path.join(home, "bin") if home else "PATH, and CUDA_HOME is not set"
        raise CannotBuild(f"no nvcc found in {where}", "install the CUDA toolkit or name its folder in CUDA_HOME, then")
    return nvcc


def cuda_version(torch: Path) -> str:
    """The CUDA release that this torch was built for."""
    found = re.search(r"^cuda(?:: [^=]*)? = '([\d.]+)'", (torch / "version.py").read_text(), flags=re.M)
    if found is None:
        raise CannotBuild(f"torch {torch_version(torch)} is not a CUDA build", "install a CUDA build of torch, then")
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


def cuda_extension() -> NativeExtension:
    """``kdkernels/_C_cuda``: the CUDA kernels, by nvcc itself (torch's CUDAExtension wants a GPU's torch imported)."""
    torch = find_torch()
    release = cuda_version(torch)
    nvcc = find_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or found[1] != release.partition(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "unknown"
        cure = f"install the CUDA toolkit {release} or name its folder in CUDA_HOME, then"
        raise CannotBuild(f"nvcc is of CUDA {version}, torch {torch_version(torch)} of CUDA {release}", cure)
    flags, names = architecture_flags(nvcc)
    extension = NativeExtension(
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
    extension.record = {
        "built": True,
        "targets": names,
        "compiler": f"nvcc {found[1]}.{found[2]}",
        "command": nvcc,
        "flags": extension.extra_compile_args,
        "environment": {},
        "torch": torch_version(torch),
    }
    return extension


def target_version() -> str:
    return f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def isa_flags(source: str) -> list[str]:
    return next((flags for suffix, flags in X86_FLAGS.items() if Path(source).stem.endswith(suffix)), [])


def isa_rank(source: str) -> int:
    return next((rank for rank, suffix in enumerate(X86_FLAGS, 1) if Path(source).stem.endswith(suffix)), 0)


def jobs(files: int) -> int:
    """How many files to compile at once."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(files, os.cpu_count() or 1, memory // BYTES_PER_JOB))


def minutes_left(done: int, total: int, seconds: float) -> str:
    """By the files that are there, of which the slow ones begin first: rather too much than too little."""
    left = seconds * (total - done) / done / 60
    return "" if done == total else f"; about {left:.0f} min left" if left >= 1 else "; less than a minute left"


def say(text: str) -> None:
    print(f"kdkernels: {text}", flush=True)


class Plan:
    """The libraries to build, and the record of them for the package."""

    def __init__(self) -> None:
        choice = os.environ.get("KDKERNELS_BUILD") or "auto"
        if choice not in CHOICES:
            raise SystemExit(f"KDKERNELS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        self.extensions: list[NativeExtension] = []
        self.record: dict[str, Any] = {
            "choice": choice,
            "python": platform.python_version(),
            "sources": build_info.source_hash(ROOT),
        }
        for kind, extension in (("cpu", cpu_extension), ("cuda", cuda_extension)):
            try:
                if choice == "none" or (choice, kind) == ("cpu", "cuda"):
                    raise CannotBuild(f"KDKERNELS_BUILD={choice} asked for none")
                if kind == "cuda" and not self.extensions:
                    raise CannotBuild("it needs the C++ extension")
                self.extensions.append(extension())
                self.record[kind] = self.extensions[-1].record
            except CannotBuild as reason:
                # A torch that nobody can see is a slip in the command: to go on without kernels would hide it.
                slip = isinstance(reason, NoTorch) and kind == "cpu"
                if slip or choice == kind or choice == "cuda":
                    raise SystemExit(failure(choice, reason)) from None
                self.record[kind] = {"built": False, "reason": str(reason), "cure": reason.cure}

    def outcome(self) -> str:
        said = []
        for kind, what in build_info.WORDS.items():
            part = self.record[kind]
            said.append(
                f"{what}: {build_info.summary(kind, self.record)}"
                if part["built"]
                else f"no {what.removeprefix('the ')}: {part['reason']}"
            )
        return "; ".join(said) + ("" if self.extensions else "; Triton and plain PyTorch still work")


def failure(choice: str, reason: CannotBuild) -> str:
    if isinstance(reason, NoTorch):
        return (
            f"kdkernels: no kernels can be built: {reason}. Install torch {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} or newer "
            "first, or leave out pip's --no-build-isolation, or set KDKERNELS_BUILD=none to install without kernels."
        )
    remedy = f" To have it, {reason.cure} try again." if reason.cure else ""
    return f"kdkernels: KDKERNELS_BUILD={choice} cannot be had: {reason}.{remedy}"


def needed_for_a_wheel() -> list[str]:
    """The packages that pip fetches for an isolated build: torch, where it is of use and there is none."""
    if (os.environ.get("KDKERNELS_BUILD") or "auto") == "none":
        return []
    try:
        find_compiler()
        find_torch()
    except NoTorch:
        return [f"torch>={TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"]
    except CannotBuild:
        pass
    return []


class BuildPy(build_py):
    """setuptools' build_py, and the record where build_ext has nothing to do."""

    record: dict[str, Any] = {}

    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            write_record((ROOT if self.editable_mode else Path(self.build_lib)) / "kdkernels", self.record)


def write_record(package: Path, record: dict[str, Any]) -> None:
    """Write the record into the folder of a package, and take away libraries of earlier builds that it denies."""
    for kind in build_info.LIBRARIES:
        library = build_info.beside(package, kind)
        if library is not None and not record[kind]["built"]:
            library.unlink()
    (package / build_info.FILE).write_text(json.dumps(record, indent=1) + "\n")


class BuildExt(build_ext):
    """setuptools' build_ext with flags of a file's own, and files compiled side by side."""

    record: dict[str, Any] = {}

    def run(self):
        try:
            super().run()
        except (CompileError, ExecError, LinkError):
            say("the build failed. CXX names another compiler; KDKERNELS_BUILD=none installs without kernels.")
            raise
        if self.extensions:
            # Of a build in place setuptools makes a copy in the sources.
            name = self.extensions[0].name
            for library in {os.path.join(self.build_lib, self.get_ext_filename(name)), self.get_ext_fullpath(name)}:
                write_record(Path(library).parent, self.record)

    def build_extension(self, ext):
        output = self.get_ext_fullpath(ext.name)
        if not self.force and os.path.exists(output) and self.was_built_alike(ext, Path(output).parent):
            built = os.path.getmtime(output)
            if all(os.path.getmtime(path) < built for path in [*ext.sources, *ext.depends, __file__]):
                return
        # Of an inline function that several files emit the linker keeps the first copy: it must be the one that every
        # processor can run.
        sources = sorted(ext.sources, key=lambda source: (isa_rank(source), source))
        count = jobs(len(sources))
        say(f"compiling {len(sources)} files for {ext.name}, {count} at a time")
        begun = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            # The slow ones, which are last in that order, begin first.
            compile_one = self.compile_one if ext.nvcc is None else self.compile_with_nvcc
            compiled = {pool.submit(compile_one, ext, source): source for source in reversed(sources)}
            objects = {}
            try:
                for number, future in enumerate(as_completed(compiled), 1):
                    source = compiled[future]
                    objects[source] = future.result()
                    spent = time.monotonic() - begun
                    say(f"compiled {number} of {len(sources)}, {source}{minutes_left(number, len(sources), spent)}")
            except Exception:
                pool.shutdown(cancel_futures=True)
                raise
        if ext.nvcc is not None:
            folders = [f"-L{folder}" for folder in ext.library_dirs]
            libraries = [f"-l{library}" for library in ext.libraries]
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            in_order = [objects[source] for source in sources]
            self.spawn([ext.nvcc, "-shared", "-o", output, *in_order, *folders, *libraries, *ext.extra_link_args])
            return
        self.compiler.link_shared_object(
            [objects[source] for source in sources],
            output,
            libraries=self.get_libraries(ext),
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def was_built_alike(self, ext, package):
        """True if the record beside a library is the one that a build would write: else it would not be true."""
        before = build_info.read(package)
        return any(before.get(kind) == ext.record for kind in build_info.LIBRARIES)

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
        # The GPUs of a file side by side too, as many as there are processors.
        self.spawn([ext.nvcc, "--threads=0", *ext.extra_compile_args, *macros, *folders, "-c", source, "-o", result])
        return result


# Commands that make or describe an installation; the others need no compiler and no torch.
INSTALLING = ("bdist", "bdist_wheel", "build", "build_ext", "build_py", "dist_info", "editable_wheel", "install")


def main() -> None:
    plan = Plan() if any(command in sys.argv for command in INSTALLING) else None
    options: dict[str, dict[str, str]] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if plan is not None and not plan.record["cpu"]["built"]:
        options["egg_info"] = {"tag_build": "+no.cpu.kernels"}
    if plan is not None:
        BuildPy.record = BuildExt.record = plan.record
    distribution = setup(
        ext_modules=plan.extensions if plan is not None else [],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
        options=options,
    )
    if plan is not None and any(distribution.have_run.get(name) for name in ("build", "build_ext", "editable_wheel")):
        say(f"built {plan.outcome()}")


if __name__ == "__main__":
    main()
