"""Certificates and kits without a key ever leaving its site: `authority` at the hub, `own_kit` at everybody."""
