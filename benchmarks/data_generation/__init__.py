"""How fast data are generated, stored and handed on."""
