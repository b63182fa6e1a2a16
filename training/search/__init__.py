"""The search for better parameters: processes train, Optuna proposes and prunes, one SQLite file remembers."""
