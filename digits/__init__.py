"""What training and serving must agree on: the wire contract, pictures, errors. Imports numpy and Pillow only."""
