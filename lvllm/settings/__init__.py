"""The settings: what each is called, where its value comes from, and what is allowed."""
