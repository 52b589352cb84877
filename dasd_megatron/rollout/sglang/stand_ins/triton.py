"""Stand-in for Triton: enough for SGLang's kernel definitions to be imported. None of them can run, and on a CPU none
has to."""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "3.8.0"
__path__ = []


class _Placeholder:
    """The class in the place of each class of Triton, which others derive from or annotate with."""

    def __init__(self, *_args, **_kwargs):
        pass

    def __init_subclass__(cls, **_kwargs):
        super().__init_subclass__()


class _Name(types.ModuleType):
    """The object in the place of everything else in Triton: a module, a decorator that returns its function, a type in
    an annotation."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name):
        return _look_up(self.__name__, name)

    def __call__(self, *args, **kwargs):
        bare = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if bare else lambda function: function

    def __bool__(self):
        return False

    def __or__(self, _other):
        return self

    __ror__ = __or__


def _look_up(parent, name):
    if name.startswith("__"):
        raise AttributeError(name)
    full_name = f"{parent}.{name}"
    if name[0].isupper() or name == "constexpr":
        bases = (Exception,) if name.endswith(("Error", "OutOfResources")) else (_Placeholder,)
        found = type(name, bases, {"__module__": parent})
    else:
        found = sys.modules.setdefault(full_name, _Name(full_name))
    setattr(sys.modules[parent], name, found)
    return found


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("triton.") else None

    def create_module(self, spec):
        return _Name(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Importer())


def __getattr__(name):
    return _look_up("triton", name)


def cdiv(dividend, divisor):
    """Return the quotient, rounded up."""
    return -(dividend // -divisor)


def next_power_of_2(value):
    """Return the least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length() if value > 0 else 1
