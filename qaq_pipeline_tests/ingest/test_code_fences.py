"""code_fences: which language the fences of an answer name."""

from __future__ import annotations

import pytest

from qaq_pipeline.ingest.code_fences import language_of


@pytest.mark.parametrize(
    ("answer", "language"),
    [
        ("Use this:\n```python\nx = 1\n```\nor\n```js\nx\n```", "python"),
        ("```python3\nx\n```", "python"),
        ("```C++ title=a.cpp\nint x;\n```", "cpp"),
        ("```c#\nint x;\n```", "csharp"),
        ("```r\nx <- 1\n```", "r"),
        ("```python:src/a.py\nx\n```", "python"),
        ("``` {.python}\nx\n```", "python"),
        ("```js{1,3}\nx\n```", "javascript"),
        ("~~~ rust\nfn f() {}\n~~~", "rust"),
        ("  ````sh\nls\n````", "bash"),
        ("```text\nhello\n```\n```go\nx := 1\n```", "go"),
        ("```\nhello\n```\n```go\nx := 1\n```", "go"),
        ("```console\n$ ls\n```", None),
        ("```\nx = 1\n```", None),
        ("```\nx = 1\n``` python\nis a language", None),
        ("```\nx\n``` That prints one.", None),
        ("```Make sure that it runs\n```", None),
        ("```main.py\nx\n```", None),
        ("``` x = 1 ```", None),
        ("Call ```python``` in a line.", None),
        ("    ```python\n    x\n    ```", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_first_language_that_an_opening_fence_names(answer: str, language: str | None) -> None:
    assert language_of(answer) == language
