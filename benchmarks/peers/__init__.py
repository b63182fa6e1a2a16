"""Other servers of the same SavedModel. The `*_app.py` files run in the peers' own environments."""
