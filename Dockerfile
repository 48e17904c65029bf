# The demo, then its page: docker build -t retro . && docker run --rm -p 7860:7860 retro
# The page can be opened from outside of the container, so it asks for the password that is printed.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /retro
COPY . .
# The CPU's build of torch, a tenth of what PyPI has.
RUN pip config set global.extra-index-url https://download.pytorch.org/whl/cpu && make .venv/installed
EXPOSE 7860
CMD make demo && .venv/bin/retro explore --host 0.0.0.0 --port 7860
