"""Browser view: a web page that shows what a publisher sends, live."""
