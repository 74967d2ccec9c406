"""How cnnfast is built: `backend` (PEP 517), `command` (setuptools), `toolchain` (what is there), `ninja_file`."""
