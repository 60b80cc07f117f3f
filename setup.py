"""The native extension, and only that: everything else about the package is in pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = Path("kernels/csrc")
KERNELS = ("linear", "recurrent", "channels", "attention", "attention_backward", "elementwise")
# Every kernel is compiled once a level; the level is chosen when the library is loaded.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = ["-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wno-maybe-uninitialized"]  # false alarms inside GCC 12's own AVX-512 headers


class BuildNative(build_ext):
    """Compile the sources level by level; without a compiler, warn and go on without the native backend."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python in it, so no Python version in its name."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            objects = [self._object(kernel, level) for kernel in KERNELS for level in LEVELS]
            objects += self.compiler.compile([str(SOURCES / "levels.cpp")], self.build_temp, extra_postargs=FLAGS)
            self.compiler.link_shared_object(objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++")
        except (BaseError, CCompilerError, OSError) as error:
            sys.stderr.write(f"warning: built without the native backend, a C++17 compiler is needed: {error}\n")

    def _object(self, kernel: str, level: str) -> str:
        flags = [*FLAGS, f"-DLEVEL={level}", *LEVELS[level]]
        folder = str(Path(self.build_temp) / level)
        return self.compiler.compile([str(SOURCES / f"{kernel}.cpp")], folder, extra_postargs=flags)[0]


class PlatformWheel(bdist_wheel):
    """A wheel for any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("spikingbrain_kernels.libnative", [str(SOURCES / "levels.cpp")], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
