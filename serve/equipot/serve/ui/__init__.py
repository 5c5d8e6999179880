"""The page to look at a server with: what it reads and asks. What browsers run is written in serve/ui."""
