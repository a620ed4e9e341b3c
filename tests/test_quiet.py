"""What other packages say while they are imported is not shown, and nothing else is hidden."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tfqc.quiet import quiet_import

NOISY = """
import logging, sys, warnings
warnings.warn("cpp extensions are not there")
logging.getLogger("noisy").warning("another torch was expected")
print("welcome"); print("beware", file=sys.stderr)
"""


def test_an_import_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "noisy_package.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(tmp_path))
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        with quiet_import():
            importlib.import_module("noisy_package")
        assert not caught and not caplog.records and capfd.readouterr() == ("", "")
        warnings.warn("ours", stacklevel=1)
        logging.getLogger("ours").warning("ours")
        print("ours")
        assert [str(w.message) for w in caught] == ["ours"]
        assert [r.getMessage() for r in caplog.records] == ["ours"] and capfd.readouterr().out == "ours\n"
    assert (list(warnings.filters), logging.root.manager.disable) == (filters, disabled)
    del sys.modules["noisy_package"]


def test_a_failure_is_raised_and_all_is_as_before() -> None:
    before = logging.root.manager.disable
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), quiet_import():
        importlib.import_module("no_such_package")
    assert logging.root.manager.disable == before


SAY = """
import sys, tfqc
from tfqc.models.find import find_model
tfqc.compile, tfqc.load, tfqc.Pipeline.parse("normalize,fold-cache"), find_model("fashion-unet")
assert "UNet2DConditionModel" in repr(type(find_model("fashion-unet").model))
"""


def test_a_fresh_interpreter_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "default", "-c", SAY], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
