"""Pictures whose heads are damaged, as bytes: on each the picture library raises another type of its own."""

import io

from PIL import Image

# orientation 6, a text, a resolution and a date
_EXIF = bytes.fromhex(
    "4d4d002a000000080004010e0002000000070000003e011200030000000100060000011a0005000000010000004687690004000000010000"
    "004e0000000061207465787400000000004800000001000190030002000000140000006000000000323032303a30313a30312030303a3030"
    "3a303000"
)
# byte -> its new value
_EXIF_DAMAGE = {
    "struct.error": {82: 36, 11: 80},
    "AttributeError": {35: 49},
    "TypeError": {38: 119, 11: 62, 65: 81},
}
# 8 x 8 pixels, of which the encoded ones are zeros
_AVIF = bytes.fromhex(
    "00000020667479706176696600000000617669666d6966316d6961664d413142000000eb6d657461000000000000002168646c7200000000"
    "0000000070696374000000000000000000000000000000000e7069746d0000000000010000001e696c6f6300000000440000010001000000"
    "0100000113000000260000002869696e660000000000010000001a696e6665020000000001000061763031436f6c6f72000000006a697072"
    "700000004b6970636f0000001469737065000000000000000800000008000000107069786900000000030808080000000c6176314381000c"
    "0000000013636f6c726e636c780001000d0006800000001769706d610000000000000001000104010283040000002e6d646174"
) + bytes(38)


def damaged_pictures() -> dict[str, bytes]:
    """{what the picture library raises: content of a .jpg}"""
    pictures = {"RuntimeError": _AVIF}
    for kind, changes in _EXIF_DAMAGE.items():
        exif = bytearray(_EXIF)
        for place, value in changes.items():
            exif[place] = value
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", exif=b"Exif\0\0" + bytes(exif))
        pictures[kind] = file.getvalue()
    return pictures
