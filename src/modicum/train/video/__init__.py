"""Training video classifiers by recipe (2103.15691, sections 3.4 and 4.1, table 7)."""
