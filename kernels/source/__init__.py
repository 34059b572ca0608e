"""The Triton sources, imported only to be launched or compiled: see `soar_mega.kernels.dispatch`."""
