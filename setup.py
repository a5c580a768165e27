"""Builds the one extension, bitdelta._C, from csrc/*.c; everything else is in pyproject.toml.

BITDELTA_SANITIZE=1  with AddressSanitizer and UndefinedBehaviorSanitizer (load libasan first: tests/sanitize.sh)
BITDELTA_CUDA=0|1    1 insists on CUDA kernels, which this version does not have
"""

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA = "not built: CUDA kernels are not part of this version"
if os.environ.get("BITDELTA_CUDA") == "1":
    sys.exit(f"bitdelta: BITDELTA_CUDA=1, but cuda: {CUDA}; unset it for the CPU build")

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


class BuildParallel(build_ext):
    """Compiles the files side by side, and always anew: flags may have changed."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True

    def build_extensions(self):
        print(f"bitdelta: cuda: {CUDA}", file=sys.stderr)
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **options), sources))
            return [item for part in objects for item in part]

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
                ("BITDELTA_CUDA", f'"{CUDA}"'),
                ("BITDELTA_FLAGS", f'"{" ".join(flags)}"'),
                ("BITDELTA_SANITIZE", str(int(sanitize))),
            ],
            undef_macros=["NDEBUG"] if sanitize else [],
            extra_compile_args=flags + warnings + systems + ["-pthread"],
            extra_link_args=["-pthread"] + ["-fsanitize=address,undefined"] * sanitize,
            libraries=["m"],
        )
    ],
)
