"""One file per family of endpoints; each has a router, and `ROUTERS` is what the app installs."""
