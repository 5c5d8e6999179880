"""How sure a bundle's answers are: measured on structures that no member was trained on."""
