"""The paper's experiments: profiles, cached stages, results, and one file per table."""
