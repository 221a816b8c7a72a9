# docker build -t dinv . && docker run -p 8888:8888 dinv
# For the CPU. reproduce.sh makes the environment, so that requirements.lock is the only list of versions.
FROM python:3.12-slim AS base
# g++: torch compiles its steps with it; npm: the last of the ways to the data sets
RUN apt-get update && apt-get install -y --no-install-recommends g++ git npm && rm -rf /var/lib/apt/lists/*

FROM base
ENV DINV_DEVICE=cpu
WORKDIR /dinv
COPY . .
RUN ./reproduce.sh --profile smoke --list
EXPOSE 8888
CMD ["./reproduce.sh", "lab", "--", "--no-browser", "--ip=0.0.0.0", "--port=8888"]
