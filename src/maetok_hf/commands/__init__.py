"""Commands of the console, one module each with a `main`; examples of the same names call them."""
