"""What `python -m veneer.as_peft` answers to the usual slips; nothing is put in place before it knows the program."""

import sys

import pytest

from veneer import as_peft


def said(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        as_peft.main(list(arguments))
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_no_program(arguments, capsys):
    said(*arguments)
    assert capsys.readouterr().err.endswith("which program?\n")


def test_a_program_that_is_not_there(capsys):
    said("nope.py", "--epochs", "3")
    assert capsys.readouterr().err == "veneer: there is no program nope.py.\n"
    assert not hasattr(sys.modules.get("peft"), "__veneer__")


def test_an_option_before_the_program(capsys):
    said("--quiet", "program.py")
    assert "the program comes first" in capsys.readouterr().err


def test_a_folder(capsys, tmp_path):
    said(str(tmp_path))
    assert f"-m {tmp_path.name}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_no_error(option, capsys):
    as_peft.main([option])
    assert capsys.readouterr().out.startswith("usage: python -m veneer.as_peft program.py")
