pytest_plugins = ["summary"]  # what was proven how, at the end of a run
