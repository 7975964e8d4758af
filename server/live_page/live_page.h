#ifndef ADAATTN_SERVER_LIVE_PAGE_LIVE_PAGE_H_
#define ADAATTN_SERVER_LIVE_PAGE_LIVE_PAGE_H_

#include <cstddef>

namespace adaattn {

// The files beside this one, embedded by cmake/EmbedText.cmake.
extern const unsigned char kLiveHtml[];
extern const std::size_t kLiveHtmlSize;
extern const unsigned char kIconSvg[];
extern const std::size_t kIconSvgSize;
extern const unsigned char kLiveCss[];
extern const std::size_t kLiveCssSize;
extern const unsigned char kPanelsJs[];
extern const std::size_t kPanelsJsSize;
extern const unsigned char kLiveJs[];
extern const std::size_t kLiveJsSize;

}  // namespace adaattn

#endif  // ADAATTN_SERVER_LIVE_PAGE_LIVE_PAGE_H_
