"""Meshes and several processes: where arrays lie, how processes agree and end."""
