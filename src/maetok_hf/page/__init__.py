"""A page in the browser to try pipelines on.

What happens behind it is in `abilities`, `generation`, `reconstruction`, `interpolation` and `comparison`, which need
neither Gradio nor a browser; `layout`, `widgets` and the tabs are the page itself, and `server` serves it.
"""
