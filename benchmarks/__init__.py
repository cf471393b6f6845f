"""How fast ``cryolike_data`` is, each figure beside the floor that the same run reached. See README.md."""
