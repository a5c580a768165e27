"""Builds the one extension, bitdelta._C, from csrc/*.c and kernels/*.cu; the rest is in pyproject.toml.

BITDELTA_SANITIZE=1      with AddressSanitizer and UndefinedBehaviorSanitizer (load libasan first: tests/sanitize.sh);
                         without kernels, or with the emulated ones, which are watched by the emulation
BITDELTA_CUDA=0          without kernels; =1 insists on them; =emulate runs them on the CPU, slowly, for tests. Unset:
                         with them where nvcc is found
BITDELTA_CUDA_ARCHS=...  targets, as "80 90a 90+PTX", or "all"; unset: the visible GPUs', else those three
"""

import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
import toolchain

sanitize = os.environ.get("BITDELTA_SANITIZE") == "1"
flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
if platform.machine() in ("x86_64", "AMD64"):
    flags.append("-march=x86-64-v2")  # faster sets are chosen at run time
if sanitize:
    flags[1] = "-O1"
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
warnings = ["-Wall", "-Wextra", "-Wconversion"] + ["-Werror"] * sanitize
# As system headers, so that the warnings are about our code alone.
systems = [f"-isystem{path}" for path in (sysconfig.get_path("include"), numpy.get_include())]


class Kernels:
    """Which kernels this build has: `about` for people, `kind` for C (0 none, 1 a GPU's, 2 emulated)."""

    def __init__(self):
        self.kind, self.libraries, self.commands = 0, [], {}
        wish = os.environ.get("BITDELTA_CUDA", "")
        if wish not in ("", "0", "1", "emulate"):
            sys.exit(f"bitdelta: BITDELTA_CUDA: expected 0, 1 or emulate, got {wish!r}")
        try:
            if wish == "0" or sanitize and wish != "emulate":
                raise toolchain.ToolError(
                    "BITDELTA_CUDA=0" if wish == "0" else "sanitizers watch the CPU's code"
                )
            if wish == "emulate":
                self.emulate()
            else:
                self.compile_by_nvcc()
        except toolchain.ToolError as error:
            self.about = f"not built: {error}"
            if wish in ("1", "emulate"):
                sys.exit(f"bitdelta: BITDELTA_CUDA={wish}, but cuda: {self.about}")
            if isinstance(error, toolchain.SettingError):
                sys.exit(f"bitdelta: {error}")

    def emulate(self):
        self.kind, self.about = 2, "emulated on the CPU, for tests"
        compiler = toolchain.cxx()
        for source in [*toolchain.kernel_sources(), *toolchain.emulation_sources()]:
            self.commands[source] = lambda output, source=source: [
                *toolchain.emulation_command(compiler, source, output), "-fvisibility=hidden"
            ]  # fmt: skip

    def compile_by_nvcc(self):
        nvcc = toolchain.find_nvcc()
        version = toolchain.nvcc_version(nvcc)
        archs = toolchain.wanted_archs(version)
        self.libraries = [toolchain.cudart(nvcc), "-lrt", "-ldl", "-Wl,--exclude-libs,ALL"]
        self.kind, self.about = 1, f"{', '.join(archs)} by nvcc {version[0]}.{version[1]}"
        for source in toolchain.kernel_sources():
            self.commands[source] = lambda output, source=source: toolchain.nvcc_command(
                nvcc, archs, source, output
            )

    def compile(self, source, folder):
        """The object of a source, compiled anew when the command, the source or any header has changed."""
        texts = [
            Path(path).read_bytes() for path in [source, *sorted(glob("csrc/*.h") + glob("kernels/*.h"))]
        ]
        identity = "\0".join(self.commands[source]("")).encode() + b"\0".join(texts)
        name = f"{Path(source).name}-{hashlib.sha256(identity).hexdigest()[:16]}.o"
        target = Path(folder) / "kernels" / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.o")
            command = self.commands[source](str(partial))
            environment = {**os.environ, "CCACHE_BASEDIR": str(toolchain.ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            print(done.stdout + done.stderr, end="", file=sys.stderr)
            if done.returncode != 0:
                raise CompileError(f"{command[0]} refused {source}; BITDELTA_CUDA=0 builds without kernels")
            partial.replace(target)
        return str(target)


kernels = Kernels()


class BuildParallel(build_ext):
    """Compiles the files side by side, and always anew: flags may have changed. Kernels know when to."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True

    def build_extensions(self):
        print(f"bitdelta: cuda: {kernels.about}", file=sys.stderr)
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                of_kernels = [
                    pool.submit(kernels.compile, source, self.build_temp) for source in kernels.commands
                ]
                of_c = [pool.submit(compile_one, [source], **options) for source in sources]
                try:
                    objects = [each.result() for each in of_kernels]
                    return objects + [item for each in of_c for item in each.result()]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

        self.compiler.compile = compile_all
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildParallel},
    ext_modules=[
        Extension(
            "bitdelta._C",
            sources=sorted(glob("csrc/*.c")),
            depends=glob("csrc/**/*.h", recursive=True),
            include_dirs=["csrc"],
            define_macros=[
                ("BITDELTA_CUDA", f'"{kernels.about}"'),
                ("BITDELTA_CUDA_KIND", str(kernels.kind)),
                ("BITDELTA_FLAGS", f'"{" ".join(flags)}"'),
                ("BITDELTA_SANITIZE", str(int(sanitize))),
            ],
            undef_macros=["NDEBUG"] if sanitize else [],
            extra_compile_args=flags + warnings + systems + ["-pthread"],
            extra_link_args=["-pthread"] + ["-fsanitize=address,undefined"] * sanitize + kernels.libraries,
            libraries=["m", "dl"],
        )
    ],
)
