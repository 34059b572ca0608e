"""Triton kernels with eager twins, imported as `soar_mega.kernels` (setup.py maps this folder to that name).

The bare name `kernels` belongs to another library, which transformers and diffusers look for. Wherever the
repository's root is on sys.path they find this folder instead. An error at import would break their check, so under
the bare name this is a library too old to be used, with nothing in it.
"""

if __name__ != "soar_mega.kernels":
    __version__ = "0"
    __path__ = []  # no submodules either

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{__file__} is not the library called kernels: its own name is soar_mega.kernels. "
            "Leave that folder's parent, or take it off sys.path"
        )
else:
    from soar_mega.kernels.correction_loss import correction_loss as correction_loss
    from soar_mega.kernels.correction_loss import losses_of as losses_of
    from soar_mega.kernels.point_tables import STREAMS as STREAMS
    from soar_mega.kernels.point_tables import PointTable as PointTable
    from soar_mega.kernels.rollout_renoise import rollout_renoise as rollout_renoise
    from soar_mega.kernels.rollout_renoise import states_of as states_of
    from soar_mega.kernels.rollout_renoise import to_tokens as to_tokens
