"""Which files are pictures, by their names."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".jxl", ".jp2", ".heic", ".heif", ".svg",
                  ".psd", ".tga", ".dng", ".cr2", ".nef", ".arw")  # fmt: skip
