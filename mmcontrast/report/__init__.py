"""What a person looks at after a run, while it goes on, or when it was killed: one page that stands alone."""
