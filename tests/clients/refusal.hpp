// What the test programs share.
#pragma once

#include <stdexcept>
#include <string>

template <class Call>
void expect_refusal(Call call, const char* what) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  throw std::runtime_error(std::string("not refused: ") + what);
}
