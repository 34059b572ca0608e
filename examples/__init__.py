"""What stands outside the library and uses it as anyone's code may; imported as `soar_mega.examples` (setup.py)."""
