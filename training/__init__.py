"""The science: validate, prepare, train, evaluate, judge and export. `python -m training STAGE`, each a DVC stage."""
