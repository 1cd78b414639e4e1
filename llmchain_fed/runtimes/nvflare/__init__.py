"""The NVFlare runtime: participants at several organisations, over mutual TLS. Needs the extra `nvflare`."""
