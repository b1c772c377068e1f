"""One file per on-disk format, each with pack and unpack and the reasons for what it can't hold."""
