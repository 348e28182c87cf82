# Scores a folder of images on the CPU. The index of torch's CPU builds, as PyTorch's page of installation
# names it, saves some GB: --build-arg TORCH="--index-url URL"
#   docker build -t fusenorm .
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" fusenorm \
#       score --detector detector.safetensors --weights net.pth images --csv judged.csv
# With a network of your own: -e PYTHONPATH=/work, and --network package.module:factory.
FROM python:3.12-slim
COPY . /source
ARG TORCH=""
RUN pip install --no-cache-dir torch torchvision $TORCH \
    && pip install --no-cache-dir '/source[fast,report]' && rm -rf /source
WORKDIR /work
ENV HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba
ENTRYPOINT ["fusenorm"]
CMD ["--help"]
