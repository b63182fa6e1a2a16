"""Side-by-side measurements, each printing its own table. Run by `make bench`; never part of `make test`."""
