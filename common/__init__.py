"""What the seven projects share and what is not the lesson: config, data, loss, metrics, tracking, Hub."""

from common.home import provide_user_and_home

provide_user_and_home()  # first of all: libraries choose their cache folders when they are imported
