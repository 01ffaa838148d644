"""Budgets as hard caps: what is reserved before a call and settled after it, and by whom."""
