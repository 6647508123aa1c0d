"""Run programs written for PEFT on Veneer: `install_as_peft()` puts Veneer's names where they `import peft`.

names.py      which module of PEFT answers which name, and what is Veneer's word for it
absent.py     what PEFT has and Veneer has not, and what to use in its place
modules.py    the modules themselves
classes.py    PEFT's names for kinds of layers, for `isinstance`
functions.py  PEFT's functions that are a line or two of Veneer's
tables.py     PEFT's constants and tables
metadata.py   the distribution that version checks ask for
install.py    put all that in place, or refuse
"""

from veneer.integrations.as_peft.install import install_as_peft

__all__ = ["install_as_peft"]
