"""The error tree is what its docstring draws, and survives process borders."""

import inspect
import re

from edge_runtime.contract import errors


def _classes() -> dict[str, type[errors.NearfarError]]:
    return {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.NearfarError)
    }


def test_docstring_draws_exactly_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:[│ ]   )*)(├── |└── )?([A-Z]\w+)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4 + (1 if match[2] else 0)
        del path[depth:]
        if path:
            drawn[match[3]] = path[-1]
        path.append(match[3])
    actual = {name: cls.__base__.__name__ for name, cls in _classes().items() if name != path[0]}
    actual.pop("NearfarError", None)
    assert drawn == actual


def test_every_class_has_its_own_code_and_is_exported() -> None:
    classes = _classes()
    codes = [cls.code for cls in classes.values()]
    assert len(set(codes)) == len(codes)
    assert set(classes) | {"error_from_code"} == set(errors.__all__)


def test_error_crosses_a_process_border_by_its_code() -> None:
    for cls in _classes().values():
        again = errors.error_from_code(cls.code, "what to do")
        assert type(again) is cls
        assert again.detail == "what to do"
    unknown = errors.error_from_code("from_the_future", "detail")
    assert type(unknown) is errors.NearfarError
    assert "from_the_future" in unknown.detail
