"""What pyproject.toml cannot say of the compiled parts: they are C libraries, called through ctypes.

No Python's ABI is in them, so one wheel a platform serves every Python. SMOLQUANT_PURE=1 leaves them out,
which makes the wheel that any platform can install: the same bytes, found slower.
"""

import os

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class Product(Distribution):
    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        super().parse_config_files(*args, **kwargs)
        if os.environ.get("SMOLQUANT_PURE") == "1":
            self.ext_modules = []


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # noqa: PTH118


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(distclass=Product, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython})
