"""How text comes out of a module: options, answers, padding, and the module's own settings."""
