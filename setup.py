"""Packages ris-fast and builds its C++ kernels: plain install, editable install and isolated build.

The kernels are one shared library with a plain C interface, built by CMake and loaded with ctypes, so the build
needs neither torch nor Python headers and one wheel serves every Python and torch version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NO_COMPILER = """
ris-fast: no C++ compiler was found (looked at $CXX, then for g++, c++ and clang++ on PATH).
The CPU kernels are C++17. Install one and run the same command again:
    Debian, Ubuntu:  sudo apt-get install build-essential
    Fedora, RHEL:    sudo dnf install gcc-c++
    conda:           conda install -c conda-forge cxx-compiler
    macOS:           xcode-select --install
To go on without CPU kernels (slow plain-torch fallback on CPU, GPU kernels unaffected): RIS_FAST_NO_NATIVE=1
"""


def without_native() -> bool:
    return os.environ.get("RIS_FAST_NO_NATIVE", "0") not in ("", "0")


def find_compiler() -> str:
    """Path of the C++ compiler; g++ goes first because only it shares torch's OpenMP pool (see CMakeLists.txt)."""
    for candidate in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(candidate) if candidate else None
        if path:
            return path
    raise SystemExit(NO_COMPILER)


def find_cmake() -> str:
    """Path of cmake: the one of the `cmake` wheel where it is installed, else the system's."""
    try:
        import cmake

        wheel = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        if wheel.exists():
            return str(wheel)
    except (ImportError, AttributeError):
        pass
    system = shutil.which("cmake")
    if system is None:
        raise SystemExit(
            "ris-fast: cmake was not found. Run `pip install cmake` (or apt-get install cmake) and try again."
        )
    return system


class BuildNative(build_ext):
    """Runs CMake once and puts the shared library where the package looks for it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no ABI tag: it is not a Python extension

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        compiler, cmake = find_compiler(), find_cmake()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DRIS_FAST_OUTPUT={target.parent}",
            f"-DRIS_FAST_NAME={target.stem}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"ris-fast: building the C++ kernels with {compiler} failed (the compiler's message is above): {error}"
            ) from error


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the library inside depends on the platform, not on the Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages() -> list[str]:
    """Everything in ris_fast/, and kernels/ under the name ris_fast.kernels."""
    kernels = ["ris_fast.kernels", *(f"ris_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]
    return [*find_packages(str(ROOT), include=["ris_fast", "ris_fast.*"]), *kernels]


def version() -> str:
    """What `ris_fast.__version__` says, read without an import: a build has no torch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "ris_fast" / "__init__.py").read_text(), re.M)
    assert found is not None, 'ris_fast/__init__.py has no line __version__ = "..."'
    return found[1]


HDF5 = ["h5py>=3.10"]  # read by `ris-fast convert` alone
TENSORBOARD, TRACKIO, WANDB, OPTUNA = ["tensorboard>=2.17"], ["trackio>=0.43"], ["wandb>=0.31"], ["optuna>=4"]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5"]
RUFF = "ruff>=0.17,<0.18"  # what it formats differs between versions
LINT = [RUFF, "import-linter>=2.17,<3", "mypy>=2.4,<2.5"]
NOTEBOOKS = ["nbclient>=0.10,<1", "ipykernel>=6"]  # the three of docs/notebooks are executed
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1,<2", RUFF]  # ruff breaks the lines of signatures
setup(
    name="ris-fast",
    version=version(),
    description="Covariance networks behind a reconfigurable intelligent surface, trained fast and watched closely",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"ris_fast": "ris_fast", "ris_fast.kernels": "kernels"},
    package_data={
        "ris_fast": ["py.typed", "config/presets/*.toml", "tuning/spaces/*.toml", "health/pages/*.md"],
        "ris_fast.kernels": ["py.typed"],
    },
    ext_modules=[] if without_native() else [Extension("ris_fast.kernels.native.libris_fast", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    setup_requires=[] if without_native() or shutil.which("cmake") else ["cmake>=3.20"],
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "scipy>=1.11",
        "cyclopts>=3",
        "safetensors>=0.4",
        "matplotlib>=3.8",
        "rich>=13",
        "nvidia-ml-py>=12",
    ],
    extras_require={
        "hdf5": HDF5,
        "tensorboard": TENSORBOARD,
        "trackio": TRACKIO,
        "wandb": WANDB,
        "tune": OPTUNA,
        "docs": DOCS,
        # Tests of the other trackers are skipped where they are missing.
        "test": [*TEST, *LINT, *HDF5, *TENSORBOARD, *OPTUNA, *DOCS, *NOTEBOOKS],
    },
    entry_points={"console_scripts": ["ris-fast = ris_fast.commands.cli:main"]},
    zip_safe=False,
)
